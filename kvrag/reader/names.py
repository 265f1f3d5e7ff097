"""Word lists of the world and the names drawn from them; one name in eight is held out of training."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

FEMALE = """
    Feine Dera Prona Meina Deina Glaia Brona Jeilia Suia Drora Reia Stosa Zaisa Klulia Vona Proura Jena
    Frailia Mane Zaira Stouia Vena Toura Traina Kliia Palia Fosa Pelia Lulia Rune Kleilia Dilia Trona Sira
    Bisa Stailia Neisa Lesa Nina Stana Siia Klana Steilia Klaisa Drousa Puna Draine Piia Gailia Zune Vuia
    Toia Gleine Goura Busa Gaisa Klelia Gloulia Gouia Paine Tresa Pisa Deisa Wene Frina Soune Stoune Fina
    Weia Molia Hora Fane Neiia Riia Niia Zilia Peia Kouna Glora Zeia Rana Kone Nouia Nisa Loura Trosa Guna
    Vailia Foulia Loulia
""".split()

MALE = """
    Freis Wain Rounato Prupren Drebert Brihito Liroumund Dubrito Hamund Bron Harik Jous Hain Brabos
    Glairik Lain Bemund Mibremund Buklais Glajobert Baito Glan Dilato Jumund Dimund Zaiwourik Pramund Tain
    Natamund Detremund Hehomund Glouto Doutrun Dibert Tustin Troubert Nounes Jeto Joun Heigon Fubert Stun
    Gloupein Boumund Luwito Laidrain Zailerik Wubert Deilebert Zubrun Trumund Gluto Gaimamund Rowen Nituto
    Ririk Maijubert Lojous Dritin Prous Naito Foglerik Rekobert Sobeito Wolubert Fodurik Loumun Breimund
    Soubeto Nodrorik Premund Dabirik Turik Preiven Joto Glabuto Kopos Beimund Pamund Jerik Guzorik Gluzun
    Stiglouto Stito Mamund Freito Wedibert Froun Dran Daimes
""".split()

SURNAMES = """
    Laiwood Dader Kloumann Klouvik Gleivik Brousen Hosen Kluski Haiwood Bevik Drouder Heider Pivik Viberg
    Kaider Steton Limann Freisen Hemann Mouder Glirov Stoton Zuwood Suski Wumann Glimann Fuberg Kerov
    Glosen Brevik Glouski Josen Gosen Prider Zasen Gaski Famann Brovik Mailey Dovik Rousen Dreiton Teley
    Vurov Trurov Jairov Baimann Weimann Mirov Deiberg Niley Brirov Saiton Faiwood Prisen Loumann Fader
    Breisen Toberg Stoder Sovik Prirov Drimann Braski Louton Teiwood Meiski Prouley Bouder Nouley Lesen
    Kleiski Navik Daiton Breiley Demann Puley Daiberg Fraiberg Niwood Guberg Kaivik Freiley Trairov Heton
    Taider Heiski Laiberg Klaisen Gliberg Juwood Wavik Maivik Poberg Bavik Jeton Rorov Simann Stouley
    Boley Dreley Luvik Taiberg Stoumann Feimann Stiton Duvik Varov Wousen Frosen Glasen Wuvik Teiton
    Frumann Fraimann Korov Pavik Woberg Geiberg Siley Besen Klivik Brivik Wasen Gerov Glomann Brasen Peley
    Zowood Keiwood Kluwood Vaiski Jarov Meski Vaton Veberg Freivik Javik Peder Paiton Siwood Voder Dreder
    Taiski Leisen Taski Jurov Loder Raski Frouder Soley Noton Huberg Wimann Stailey Kowood Fremann Fiwood
    Mumann Tewood Louvik Leimann Naley Steivik Meimann Trisen Maiwood Morov Beiton Taivik Pevik Roley
    Praisen Roder Taiton Moumann Leberg Tawood Leivik Deirov Susen Jeiton Femann Toley Treider Zider
    Glurov Mider Wuski Tuski Peiberg Trailey Lasen Faiberg Tramann Tuwood Zouski Geiton Goumann Heimann
    Pouton Pouley Glouley Fraider Truder Meisen Staski Prouder Brorov Keski Powood Juski Laiton Praimann
    Draimann Vuley Breiton Rarov Dravik Paton Stiberg Gader Drivik Zevik Futon Jirov Karov Pasen Seider
    Beiberg Peiton Doumann Tarov Drider Hoder Brailey Jouder Bravik Berov Jider Kaiberg Piley Klirov
    Louwood Juvik Staley Seimann Leiberg Nuvik Hurov Sawood Kleton Lomann Starov Vowood Raisen Luton
    Pomann Geley Klairov
""".split()

CITIES = """
    Glaford Draiford Faiburg Haville Zufield Nistad Koport Daburg Raiford Deiville Treiport Frastad
    Braburg Prouburg Truford Paihaven Lehaven Liford Faford Staiport Dreiburg Naihaven Pehaven Koburg
    Vouport Fufield Gliburg Suhaven Houville Nouville Jestad Kleistad Glefield Miburg Priford Pruport
    Mafield Hiport Proport Steville Zuport Fostad Befield Praihaven Touville Mouport Glihaven Fraiburg
    Prouville Klohaven Sastad Wouford Priburg Doport Drustad Beminster Draiville Bruville Puville Dreiport
    Gliford Frafield Stafield Zaihaven Glaifield Lahaven Trahaven Priville Moburg Feifield Taburg Tustad
    Stestad Prafield Kliville Stuville Siford Pristad Sustad Westad Stofield Stouford Bohaven Geifield
    Jostad Zaport Staiford Preiford Weminster Maihaven Trostad Woustad Meburg Zeford Sifield Stefield
    Voustad Jaifield Taiburg Loustad Ruport Geiburg Bruford Rufield Louhaven Maifield Geiford Naiville
    Klaihaven Jiville
""".split()

FIRMS = """
    Vaipreium Pruor Protek Breco Veiex Jaco Dratraix Puum Sotek Fior Beex Proutek Bratraiix Kluix Heor
    Klotek Bagleior Naor Gloex Sico Nutek Pegleium Mutek Bodiix Libutek Draireico Tedreico Lotek Klomaco
    Kiix Doco Routek Fraico Weitek Jouor Glouum Vuor Sairotek Feum Ruum Bijatek Viix Gedaior Gevuex Jium
    Jailouum Hiex Traimaum Gleikleix Drustoum Laor Moco Tisoor Vumaiex Zuex Gleex Gaiwetek Woheco Naivouor
    Trotek Poex Frizoor Glafraico Dotuix Trouum Globouix Vufior Keor Zitrior Zeigeum Baipoex Huix Vutek
    Fraitek Saijior Bratek Daiwuex Mougaiex Dutuum Dium Beiix Klitiex Wailium Koklior Hobraex Bropeitek
    Jeix Fritek Danouix Waiex Steiix Dapreico Naum Witek Bousaior Peor Proumitek Braior Seiklouum Jaior
    Goum Vefaior Klosoutek Drofroor Gluum Guum Glougleum Metek Preum Neior Gouex Klatek Braiex Votek
    Drimeor Seum Fraiwaium Heix Praiwouex Drairaior
""".split()

FIRM_ENDINGS = """
    Labs Systems Foods Motors Bank Press Mills Energy Tools Books
""".split()

PROJECT_ENDINGS = "Project Plan Mission Programme Study Trial Survey Venture Quest Scheme".split()

VILLAGE_BEGINNINGS = "Upper Lower Old New Great Little East West North South Far High".split()

VILLAGES = """
    Browick Gouby Dradale Duthorpe Rucombe Fuholm Naby Fouholm Braby Steidale Voudale Stewick Prowick
    Sathorpe Klouwick Laiwick Kouwick Bodale Ticombe Heiwick Pruwick Vaholm Geicombe Kluthorpe Trewick
    Waiholm Kleiwick Vaicombe Paithorpe Klithorpe Boudale Luthorpe Fucombe Haiby Seholm Jaidale Zeicombe
    Hathorpe Glathorpe Louthorpe Prethorpe Wathorpe Deholm Wiby Hacombe Bowick Wacombe Laithorpe Maby
    Zouholm Houby Kaiby Bithorpe Prewick Maiholm Vouby Touholm Bouby Fodale Biby Roholm Haicombe Friholm
    Klodale Gaidale Gaiby Traby Traiby Seidale Troby Bucombe Glowick Keicombe Jouthorpe Puthorpe Jewick
    Pothorpe Biwick Praiby Neiby Keiwick Sothorpe Briholm Seicombe Waby Deby Feiby Glicombe Praidale
    Klothorpe Hiby Heby Pradale Hawick Raicombe Wudale Keidale Leidale Tathorpe Veithorpe Treby Vadale
    Trouholm Nadale Praiholm Gleiwick Luholm Doholm Houcombe Prouholm Feholm Proholm Klocombe Fouthorpe
    Lewick Trudale Vedale Wiholm Boby Briwick
""".split()

PROJECTS = """
    Kuglueon Prouon Feiara Broulaion Meituara Liis Vaion Keon Droueon Moufreeon Pipraus Laara Zeizouon
    Gleis Drouon Souon Vaieon Reiis Maus Kopraus Prudaieon Trureiis Trajuus Mujous Gaieon Viklaius Vawaion
    Maion Gloujous Lougoon Meon Douus Wieon Truus Fois Neus Breius Voutreius Vion Nuus Vijuara Foeon Keius
    Glegouus Maieon Braion Teara Klazouon Puara Gieon Zosuon Baius Truon Kaieon Glaiwaius Jeis Brais Mieon
    Daiwiara Treara Touara Heon Drieon Rekouus Sais Klojeiis Draon Pous Zius Beileara Dous Staus Staion
    Giara Dousion Meibreus Wius Zigous Vebouon Praideus Kleion Sipouus Vubrouis Meiis Weduus Gouis Paeon
    Taileion Taiis Jajouis Stuniara Daieon Stajaion Froumoon Traeon Luara Klius Freiis Bion Nuara Reius
    Jaijeiis Toueon Vabreis Nuziis Braipion Fosaeon Wuus Zameion Paivuara Fopraus Witruon Laiviara
    Postaieon Pudrois Preitiara Fuis Treizeara Kleipruon Nabruara
""".split()

PETS = """
    Hopy Zeipy Fripy Laizy Paibo Vimo Trukin Kezy Pramo Seizy Sukin Glomo Jazy Feimo Vemo Stokin Draimo
    Klamo Draikin Nizy Prazy Broupy Glubo Prokin Jakin Buzy Dupy Leimo Glabo Trupy Sizy Troukin Stopy
    Frukin Wazy Vobo Rupy Daikin Bumo Timo Klupy Wibo Boupy Dribo Pebo Pipy Preikin Hakin Preizy Mikin
    Dromo Bapy Zakin Kaimo Popy Gaizy Drikin Noupy Pizy Vouzy
""".split()

RIVERS = """
    Droune Vowe Lole Drole Nane Glane Brine Pele Fish Preile Bele Trune Trawe Frouwe Vone Stesh Dole Klush
    Zuwe Staiwe Dele Trone Mole Brawe Brish Hish Klash Drine Toush Kosh Bosh Rile Keish Dene Gawe Prewe
    Jash Vewe Stish Glaish Dosh Tele Jele Rale Dile Tune Drush Mine Naish Beiwe
""".split()

MONTHS = """
    January February March April May June July August September October November December
""".split()

COLOURS = """
    red blue green yellow purple orange black white silver gold pink brown grey teal crimson violet
""".split()

JOBS = """
    baker nurse pilot teacher plumber lawyer farmer painter chemist tailor barber judge sailor welder
    singer writer dentist banker guard chef miner editor driver surgeon
""".split()

HOBBIES = """
    chess fishing knitting climbing sailing dancing cycling pottery archery fencing rowing judo yoga
    surfing skiing painting running reading
""".split()

FOODS = """
    soup bread cheese rice pasta salmon honey apples cherries pickles noodles pancakes dumplings waffles
    beans plums curry stew pie jam
""".split()

PRODUCTS = """
    lamps clocks boats bricks shoes engines pumps chairs bottles drones robots batteries violins carpets
    tents kites mirrors ladders bells candles
""".split()

STATUSES = """
    active paused finished delayed cancelled planned approved blocked
""".split()

LANGUAGES = """
    Python Rust Java Go Ruby Swift Kotlin Perl Haskell Scala
""".split()


@dataclass(frozen=True, slots=True)
class Entity:
    """Somebody or something that documents speak of: its kind and its two-word name."""

    kind: str
    name: str

    @property
    def pronouns(self) -> tuple[tuple[str, str], ...]:
        """(subject, possessive) pairs that may stand for the name, as at the start of a sentence."""
        if self.kind == "person":
            return (("She", "Her"),) if self.name.split()[0] in _FEMALE else (("He", "His"),)
        return (("It", "Its"), (f"The {self.kind}", f"The {self.kind}'s"))


_FEMALE = frozenset(FEMALE)

# kind of entity -> (first words, second words)
_NAMES = {
    "person": (FEMALE + MALE, SURNAMES),
    "company": (FIRMS, FIRM_ENDINGS),
    "village": (VILLAGE_BEGINNINGS, VILLAGES),
    "project": (PROJECTS, PROJECT_ENDINGS),
}
KINDS = tuple(_NAMES)


def is_held_out(name: str) -> bool:
    """Whether a full name is kept for evaluation: a training row never contains it."""
    return zlib.crc32(name.encode()) % 8 == 0


def draw(rng: random.Random, kind: str, *, held_out: bool, like: Entity | None = None) -> Entity:
    """A new name of this kind.

    Args:
        rng: source of randomness.
        kind: one of `KINDS`.
        held_out: draw from the names kept for evaluation instead of those for training.
        like: an entity of the same kind to be confused with; the result shares one word with it.
    """
    firsts, seconds = _NAMES[kind]
    while True:
        first, second = rng.choice(firsts), rng.choice(seconds)
        if like is not None:
            shared = like.name.split()
            first, second = (shared[0], second) if rng.random() < 0.5 else (first, shared[1])
        name = f"{first} {second}"
        if is_held_out(name) == held_out and (like is None or name != like.name):
            return Entity(kind, name)
