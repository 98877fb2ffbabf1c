"""Encoded frames of `corpus.files.RAMP` (its 8 highest bits, or less 2048 where signed), by other encoders than ours.

JPEG: libjpeg-turbo 3.1; JPEG-LS: CharLS 2.4; JPEG 2000: OpenJPEG 2.5; HTJ2K: OpenJPH 0.26.
"""

from base64 import b85decode


def _frame(text: str) -> bytes:
    return b85decode("".join(text.split()))


JPEG_8 = _frame("""
|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf
3je?W3kU!Z03ZPY5di<h03QGV0R;g80RaI400000000000RjUA1qKHQ2?`7U!~nGr00IF60|EpC1qB2I0004f0RjU61Q7)iAu&M)6H#FYB5@Ql
fsvsIBSNvk6;jdgBr{@if(Z&17Z@2DB_<~*DJnEIHa9pqIzvQ7Mn_0VN>fx-
R##YAT4Q8oW@l(=YIAgTc6WGrdV_?8hKGoWijtF*m6n&7nVO=bq@|{(sHv*5v$VCgx45~w!o$SH#>dFX%F@%+)z;V8+1laa<K*S$=jiF`@$&QZ
_4fDp`TGCb00;pA002J#{N=X)0D^7*0MrBj03lX|xBL@t{-7WE3bZZ1;G2K-
0RI5URiSPF00i6r0H_E4La*HmZ}=wP{XjqR6=++3!8ZQ@>H+@%kgG!5{t37L08kJ7g<2Nh@J+w^fPdsF|Je
""")

JPEG_12 = _frame("""
|JeWF01!$>Nk#wx0RR9200961|JwjV00IF40RaI50RaI50s;a81OoyB0s;jD1Oo&H1qKEN1qKEN2MGuU2MGrT1_%oX2?`1d3JL}Y3k(Yi3<(Mf
3je_X3k(1d03ZPY5di<h02KfM0RR910000000000000094gbUd8xQ~h2LS*80000000000000084JkB7QRDyG00;pA002J#oZeegaig%lR@{OB
TT^kPu)bE@f&g1naig%lR@{OBTT^kPu)bE@h0p@pn~fcX^0wp<0@|C69fk6?<PZYdn~fcX^0wp<0@|C69fk6?<Ujw}
""")

JPEG_LOSSLESS = _frame("""
|JeWF01!$>Nk#wx0RR9200961|HA+a3;+-
SAOQgp0RO}Q761VO0RR910000000000000CD4FB2y2mt{A0RRBc{)8b2LJ))@2tp8qAqYYcgdqq*C;||KAqYYcgdqq*5QHHJLJ))@2%rc;5QHH
JLJ))@2tp8qAqYYcgd%_;2tp8qAqYYcgdqq*5QHHJLJ*1ogdqq*5QHHJLJ))@2tp8qAqYY!0uY2D2tp8qAqYYcgdqq*5QHHJpa?<`gdqq*5QHH
JLJ))@2tp8qB7h+XLJ))@2tp8qAqYYcgdqq*5Q+eVAqYYcgdqq*5QHHJLJ))@2tp_V5QHHJLJ))@2tp8qAqYYcgdqr^2tp8qAqYYcgdqq*5QHH
JLJ))^fFTG%5QHHJLJ))@2tp8qAqYYciU5Qm2tp8qAqYYcgdqq*5QHHJLMQ?dgdqq*5QHHJLJ))@2tp8qAqb!dLJ))@2tp8qAqYYcgdqq*5QHL
tAqYYcgdqq*5QHHJLJ))@2tp8#|Je
""")

JPEG_LOSSLESS_PREDICTOR_6 = _frame("""
|JeWF01!$>Nk#wx0RR9200961|HA+a3;+-
SAOQgp0RO}Q7XSeP0RaF20000000000000OC2@L<*00;pA00sa6=l=kriYTIrD58oeqKYV@iYTIrD58oeqKY&D0DwRs5C{YU0RVtNAP@)y0s#P
kKp+qZ1Ofp7fIuJ+2m}UzAP@)y0s#PkKp+qZ1Ofp7fIuJ+2m}HF0DwRs5C{YU0RVu|1Ofp7fIuJ+2m}HF0DwRs5C{YU0RVtNAP@)y0s#PkKp+q
r0DwRs5C{YU0RVtNAP@)y0s#PkKp+qZ1Ofp7fIuJ+2m}HHKoAH70s#PkKp+qZ1Ofp7fIuJ+2m}HF0DwRs5C{YU0RVtNXaWHMfIuJ+2m}HF0DwR
s5C{YU0RVtNAP@)y0s#PkKp+qZ4FEtO5C{YU0RVtNAP@)y0s#PkKp+qZ1Ofp7fIuJ+2m}HF0iXy30s#PkKp+qZ1Ofp7fIuJ+2m}HF0DwRs5C{Y
U0RVtNAT$90fIuJ+2m}HF0DwRs5C{YU0RVtNAP@)y0s#PkKp+qZ1O|X05C{YU0RVtNAP@)y0s#PkKp+qZ1Ofp7fIuJ+2m}HF0D#a00s#PkKp+q
Z1Ofp7fIuJ+2m}HF0DwRs5C{YU0RVtNAP^b=fIuJ+2m}HF0DwRs5C{YU0RVtNAP@)y0s#PkKp+qZ1Ofv<5C{YU0RVtNAP@)y0s#PkKp+qZ1Ofp
7fIuJ+2m}HF0DwSf0s#PkKp+qZ1Ofp7fIuJ+2m}HF0DwRs5C{YU0RVtNAP@)*06-uR2m}HF0DwRs5C{YU0RVtNAP@)y0s#PkKp+qZ1Ofp8|Je
""")

JPEG_LS = _frame("""
|JeWN03cIPNk&Eh0ssI30000G0000W3J?YX0003j0003j|L6b+00001|JeWc01FTR5C9+n0TBTI_y7$7|Nj6I07C&306_oR00;pA00000pnMO3
us#OCa7-
Qx1K?~I1i|32SS%bI92^`R92^)hV8MfcAcPKsAgDwd2?T_Mf`WpAf`Ww#6etiNK!E}T2oNBK0D%Go5J3bGK?D#%1Q0<45J3bGK?D#%1F!TDK?D
$lAqYYcgdqq*5QHHJLJ)&L$U+c=ArTP~5fKp)5fKp)5LfjP5fKp*NhFd<B$7!XAH<SLB$BGCs;a0r?NwD(|9{}0r~iNdd=v8jfB%1k{6GJH|6x
Aw|9}5@FSGxD|9%VV|9}5~g8D!IfB#^<Z~uS)cp(4T
""")

JPEG_LS_NEAR_2 = _frame("""
|JeWN03cIPNk&Eh0ssI30000G0000W3J?YX0003j0003j|L6b+00001|JeWc01FTR5C9+n0TBTI_y7$7|Nj6O08IfR06_oR00;pA00IC2pl}#C
3>*v?Fd=}!z`=t87+``JA%r6cLNK#IAfTZ_g#=JR1Q9|IgrNvR5QHKkAXaFIh=_=Yh=_=Yh=`I&BqubINhFd<B$7!as-
Zcms;a80s;l91fB%2~LgfE{|9^$a|9}5~7bpLJ|9o7Z|9}5*a)1AS|3St7fB%067yp0%d`w^efB$eXfB%2~L5u%?|9$}f*#
""")

JPEG_2000 = _frame("""
|4;u>04V?f0000W0000G00000000000000W0000G0000000000009dD0sm3}3;+NC0RRC61ONg5TmT0^U}$J?|6~9q00BdCWnpw>WFTUBAWv{*
Zc0!^M<8}(a&u{KZXhx)H7+#&kN^q*00000lK=t#li%UU5;GvxhJJ}#?6qKXi2wko0ssL((S*}Y*#KmHRgaln#>jQ1Q6dIk-
0Ep9`7<Iuwyi&6CzOK8Z9#OOwX&`Cw7RyJR@2ffKGPt$PP?ydhQnd7*lXp6*O6Ow^L*bnxZn$H|7cc@h*EU`LQ{fI|9`*_kR%_NC|{?3duFag2
tWVX
""")

JPEG_2000_SIGNED = _frame("""
|4;u>04V?f0000W0000G00000000000000W0000G000000000000D~u0sm3}3;+NC0RRC61ONg5TmT0^U}$J?|6~9q00BdCWnpw>WFTUBAWv{*
Zc0!^M<8}(a&u{KZXhx)H7+#&kN^q*00000lK=t#li%UU5;GvxhJJ}#?6qKXi2wko0ssL((S*}Y*#KmHRgaln#>jQ1Q6dIk-
0Ep9`7<Iuwyi&6CzOK8Z9#OOwX&`Cw7RyJR@2ffKGPt$PP?ydhQnd7*lXp6*O6Ow^L*bnxZn$H|7cc@h*EU`LQ{fI|9`*_kR%_NC|{?3duFag2
tWVX
""")

JPEG_2000_LOSSY = _frame("""
|4;u>04V?f0000W0000G00000000000000W0000G0000000000009dD0sm3}4gmrH0RRC61ONbti2qyw3qoilchh&%cVho!03`qcLvm$dbY)~9
VtF7>aAj^vP(?=|c4cyNX>V>IGA=bPH2;tQ3IG5A004vl0soWFv3wBRLThZ-!E8C-zaRimpzr_-5a{-
TrzbL+eM?^{c5Yj#q1Ij<+)x1~Jj!)H3%!kX(0al7qD@EfmLM9AQ?aX2q78_F_>%HX%mo_s7>J3(0_-
*$2JJcI<av2{XrMka0A{X4&A2Nunixm^dau&r@&DN
""")

HTJ2K = _frame("""
|4;u>04YEK0000W0000G00000000000000W0000G0000000000009pH0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw
h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000rvL%}lfVEbN%jQ?bO68r5`ZEBhjakI0206e6#$R`K{NnH(n$UQ;xquj024p}6@Uox
fP!=Y9_bN}c;o;f0H;;}zyK9600pW-2=V3$Z~}G!e)Pi+Km72+4?q6s6rg+dQi1Hc0Kfn$-
~bm!wr$(__@}3*LU;iF{r&y@{r&y@{r&y@{r&y_OaR6Qzhf94{fuCH_A!C%vjP9v
""")

HTJ2K_SIGNED = _frame("""
|4;u>04YEK0000W0000G00000000000000W0000G000000000000EBy0sl|{2mk^A000XAQUDA90ssL31q1{@0smY86Cj9?kdTm&kdTm&kdTmw
h=~7W02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000rvL%}lfVEbN&W(dbO68r5`ZEBhjakI0206e6#$R`K{NnH(n$UQ;xquj024p}6@Uox
fP!=Y9_bN}c;o;f0H;;}zyK9600pW-2=V3$Z~}G!e)Pi+Km72+4?q6s6rg+dQi1Hc0Kfn$-
~bm!wr$(__@}3*LU;iF{r&y@{r&y@{r&y@{r&y_OaR6Qzhf94{fuCH_A!C%vjP9v
""")

HTJ2K_LOSSY = _frame("""
|4;u>04YEK0000W0000G00000000000000W0000G0000000000009pH0sl|{2mk^A001TbQUDA90ssL31q1{@0RLP7BO;G<k429~j~9nrhg^p}
f2x0~f5K=rXf<efU>aZ=Z@>R!02crOPjF>!N>E53R%LP^FfKASE;BCwkN^q*00000jQ|1vlfVEb0saLCbO68rCGr4=bO68rNdN&j{xLHEpo9JZ
f;0fY0FnR&Xz-$Q00aC0et;j~0000Mwg8|3ZGZ>>01}?y2`4<^geRQv0001|OaKC#zP0K-
0H6ZszyJWz&?p*3qi7V3qER%8{(oU5I%JgTl2fKhP16|0F^uB@|Je
""")
